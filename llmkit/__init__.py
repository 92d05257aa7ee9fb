"""llmkit makes a ChatGPT-like assistant from nothing, one composable subcommand per stage."""

__version__ = "0.1.0"
