"""The data set that ships with capnas and the script that makes it from the full one."""
