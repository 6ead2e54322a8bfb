"""Operations on plain arrays: checks, padding, intensities, probabilities, label maps, components.

No files, no engine.
"""
