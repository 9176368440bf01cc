"""The neighbours, one file each, imported only when used."""
