"""Image classification with networks of timm."""
