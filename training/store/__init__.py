"""The tile store: every tile of every slide, cut once, read at random by many.

    store.json                what was asked for; a store is never a mixture of two cuts
    slides/<image_id>.arrow   the tiles of one slide (Arrow IPC), renamed into place when it is complete
    overlays/<image_id>.png   the slide with the outline of its tissue and its tiles
    contact_sheets/<...>.png  some of its tiles
    index.parquet             one row a tile, with slide, patient, centre and label; written last
    report.html               all slides at a glance, those that failed first

`training.store.writer.write_store` makes one, `training.store.reader.TileStore` reads one. No torch in here.
"""
