"""The page of `crfrefine tune`: sliders for the parameters, and at once what they do to a case.

README.md maps the modules.
"""
