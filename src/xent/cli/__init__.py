"""The command line: ``xent fit``, ``predict`` and ``verify``, a file a command."""
