"""What the paper builds on DeCLIP: detectors and segmenters."""
