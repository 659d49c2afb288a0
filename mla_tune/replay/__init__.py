"""Request traffic, replayed: how a server would batch it into forwards, and what every rule would make of them."""
