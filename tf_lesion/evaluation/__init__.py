"""How well a score shows lesions."""
