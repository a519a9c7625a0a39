"""The command line of bn-insert: one file a command."""
