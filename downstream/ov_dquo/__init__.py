"""F-ViT: open-vocabulary detection on a frozen CLIP (paper, section 4.3)."""
