"""Large volumes with many labels: cost and memory follow the labels that are present in each part of the volume."""
