"""What a call does around a page: masks, rotary tables, the cache, operators with an arithmetic, outputs."""
