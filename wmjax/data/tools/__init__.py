"""Commands on datasets: check and transcode."""
