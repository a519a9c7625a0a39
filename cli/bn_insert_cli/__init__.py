"""The command line of bn-insert, with one file per command."""
