"""What runs the graph of a module."""
