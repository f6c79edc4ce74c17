"""The first contact with a card: what is right, and how fast it is, within minutes. See docs/first-contact.md."""
