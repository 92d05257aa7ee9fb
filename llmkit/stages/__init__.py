"""One module a subcommand, each with a config dataclass and `run(config) -> Summary`."""
