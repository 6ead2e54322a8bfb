"""The command `info`: files, folders and this installation, described."""
