"""CRIU: find it, configure it, read its images, statistics and logs."""
