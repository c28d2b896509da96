"""The programs' commands, a module each with `main(argv) -> exit code`."""
