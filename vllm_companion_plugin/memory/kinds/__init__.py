"""The kinds of memory that an arena can be made of, a file each."""
