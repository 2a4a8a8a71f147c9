"""The toy world: drawn scenes and nano models, with which everything runs offline in minutes."""
