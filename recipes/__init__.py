"""Programs a recipe can name: each wires the modules for one purpose."""
