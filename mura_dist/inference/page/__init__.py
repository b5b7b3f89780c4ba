"""The web page that runs an exported model on one study."""
