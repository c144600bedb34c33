"""The networks of the five modules, in plain TensorFlow, with the variable names of TF-Slim."""
