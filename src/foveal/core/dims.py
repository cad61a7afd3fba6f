"""The legend of shapes, used in names, docstrings and comments throughout the house.

    B     sequences in a batch
    H     query heads                    Hkv   key/value heads (H is a multiple of Hkv)
    G     query heads per KV head, H / Hkv
    Lq    queries per sequence           Lk    keys per sequence
    T     tokens per sequence where queries and keys are the same
    D     size of a query or key head    Dv    size of a value head
    E     width of the model (embedding) F     width of the MLP
    V     entries of the vocabulary

`attend` takes `[B, H, Lq, D]`, `[B, Hkv, Lk, D]`, `[B, Hkv, Lk, Dv]`, as PyTorch's
`scaled_dot_product_attention` does; packed calls take `[tokens, H, D]`.
"""
