"""DreamBooth on SDXL: a subject taught from a few photographs."""
