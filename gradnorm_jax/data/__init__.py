"""From files to batches of pixels: decoding, preprocessing, sources and the loader."""
