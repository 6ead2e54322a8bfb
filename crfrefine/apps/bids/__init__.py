"""The commands on BIDS datasets: a network's segmentations in derivatives in, derivatives out; and their evaluation."""
