"""What one does with a model: segment, visualize, export, bench."""
