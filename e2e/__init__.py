"""End-to-end training of a patch encoder and a multiple-instance head from slide labels."""
