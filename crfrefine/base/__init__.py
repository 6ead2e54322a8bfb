"""What every room stands on, and what knows nothing of images: texts, notices, failures, threads, memory, the order of axes."""
