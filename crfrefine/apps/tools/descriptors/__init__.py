"""Descriptions of the commands for programs that run others: 3D Slicer and MITK, and Boutiques. Made from the commands, never stored."""
