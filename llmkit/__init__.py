"""llmkit makes a ChatGPT-like assistant from scratch, one composable subcommand per stage."""

__version__ = "0.1.0"
