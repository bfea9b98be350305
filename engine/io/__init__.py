"""Files, folders, pictures and the command line. Everything stands on these; they import nothing else of ours."""
