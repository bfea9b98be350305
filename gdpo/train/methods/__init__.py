"""What is trained and one step of it, a module a method."""
