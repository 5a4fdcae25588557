"""Names that the libraries use for the parts of a transformer: blocks, projections, positions and buffers.

Each tuple combines the attribute names of transformers, timm and torchvision; the first one that a module defines is
used.
"""

# Blocks

ATTENTION = ("attention", "attn", "self_attn", "self_attention")
NORM_BEFORE_MLP = ("layernorm_after", "norm2", "layer_norm2", "ln_2")
NORM_BEFORE_ATTENTION = ("layernorm_before", "norm1", "layer_norm1", "ln_1")
NORM_AFTER_ATTENTION = ("layernorm_before", "norm1")  # in post-norm blocks, which normalise the output of a branch
LAYER_SCALES = (("layer_scale1", "layer_scale2"), ("ls1", "ls2"))
# If the layer scale is a parameter of the block, each branch ends in its stochastic depth, if both branches have one.
SCALE, DEPTHS = "gamma_1", ("drop_path1", "drop_path2")
POST_NORM = (  # class names
    *("Swinv2Layer", "SwinTransformerV2Block", "SwinTransformerBlockV2"),
    *("SwinTransformerV2CrBlock", "ResPostBlock", "EvaBlockPostNorm"),
)

# Projections of attention

QUERY_AND_VALUE = (("q_proj", "v_proj"), ("query", "value"))  # separate layers
JOINT_QKV = "qkv"  # one layer for query, key and value

# Positions: the last component of the path of a parameter, buffer or module

POSITION_EMBEDDINGS = ("position_embeddings", "pos_embed", "pos_embedding")  # tensors added to the tokens
POSITION_EMBEDDING_MODULES = ("position_embedding", "position_embeddings")  # the same as nn.Embedding
RELATIVE_BIAS_TABLES = ("relative_position_bias_table",)  # Swin, BEiT: added to the scores, one row per offset
RELATIVE_OFFSETS = ("relative_coords_table",)  # Swin v2: its bias is computed from these
ROTARY_MODULES = ("rope", "rope_embeddings", "rotary_emb")  # rotate queries and keys

# Buffers

# Buffers that a class computes from its sizes; older versions of the libraries saved them in checkpoints.
COMPUTED_BUFFERS = (
    *("position_ids", "relative_position_index", "relative_coords_table", "attn_mask", "num_batches_tracked"),
)
