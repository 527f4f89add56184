"""The networks. Shapes in docstrings and annotations have one vocabulary.

B clips, T frames, H and W patch rows and columns, P patches (padded), N selected tokens, S tokens
with CLS (1 + N), L tokens with CLS and padding, C width, D channels of a head, K layers, G groups.
"""
