"""Where goldens live: layout, staging and publishing, catalogue, archives."""
