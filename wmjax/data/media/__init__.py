"""Video, images and tables as files: decoding, cropping and scaling. Knows no dataset format."""
