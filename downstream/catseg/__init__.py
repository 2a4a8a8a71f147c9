"""CAT-Seg, trained open-vocabulary segmentation, over DeCLIP (Tables 4 and 9)."""
