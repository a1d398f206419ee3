"""What the documentation tells a user to type, run; what it says about files, compared with the files."""
