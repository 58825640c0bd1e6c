"""Messages that scripts import from hivemind's generated modules."""
