//! The expert service: cells, queue by layer, grouped FFN.
