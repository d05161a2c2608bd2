"""Text into tokens, tokens into batches. Nothing here knows about models."""

from .batches import (
    Batch as Batch,
    Batches as Batches,
    ContinuingBatches as ContinuingBatches,
    PackedBatches as PackedBatches,
)
from .shards import Shard as Shard, write_shard as write_shard
from .text import (
    Document as Document,
    Splits as Splits,
    find_documents as find_documents,
    split_by_file as split_by_file,
    split_by_position as split_by_position,
    standard_library as standard_library,
)
from .tokenizers import (
    ByteTokenizer as ByteTokenizer,
    CharacterTokenizer as CharacterTokenizer,
    JsonTokenizer as JsonTokenizer,
    Tokenizer as Tokenizer,
    load_tokenizer as load_tokenizer,
    save_tokenizer as save_tokenizer,
)
