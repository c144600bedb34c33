"""What a module is: spec, store, signatures, engines, networks. Knows nothing of Beam."""
