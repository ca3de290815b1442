"""Code that runs inside a container; never imports gpuckpt."""
