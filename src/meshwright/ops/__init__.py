"""The language: operations on named tensors, a file for each family.

An operation stands in one place, its local rule and its communication together. It never asks what the layout is: it
asks the scope over which axes a name is split, and works on whole arrays when there is no scope.
"""
