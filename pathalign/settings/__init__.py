"""The settings of every stage, one file each, free of torch: the command line's help is made from them."""
