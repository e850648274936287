//! The rotary embedding in its two spellings: `rope_theta` with `rope_scaling`, or `rope_parameters`.

use super::{ConfigError, RopeScaling};
use crate::json::{self, Fields};

/// Base and scaling.
type Rope = (f64, Option<RopeScaling>);

pub(super) fn read(fields: &Fields<'_>) -> Result<Rope, ConfigError> {
    let theta = theta(fields)?;
    let scaling = match fields.object("rope_scaling")? {
        Some(given) => scaling(&given)?,
        None => None,
    };
    let older = (theta.unwrap_or(10000.0), scaling);
    let Some(given) = fields.object("rope_parameters")? else { return Ok(older) };
    let newer = (self::theta(&given)?.unwrap_or(older.0), self::scaling(&given)?);
    let older_given =
        theta.is_some_and(|theta| theta != newer.0) || (fields.value("rope_scaling").is_some() && older.1 != newer.1);
    if older_given {
        return Err(ConfigError::RopeConflict { found: format!("{newer:?}"), expected: format!("{older:?}") });
    }
    Ok(newer)
}

/// A base of 1 or less turns every frequency the same way and divides by ln 1 = 0 in YaRN.
fn theta(fields: &Fields<'_>) -> Result<Option<f64>, ConfigError> {
    match fields.number("rope_theta")? {
        Some(theta) if theta <= 1.0 => Err(fields.out_of_range("rope_theta", theta, "a number above 1").into()),
        given => Ok(given),
    }
}

fn scaling(given: &Fields<'_>) -> Result<Option<RopeScaling>, ConfigError> {
    if kind(given)? == "default" {
        return Ok(None);
    }
    for option in ["attention_factor", "truncate"] {
        if let Some(value) = given.value(option) {
            return Err(ConfigError::RopeOption { field: given.path(option), found: json::describe(value) });
        }
    }
    let factor = given.number("factor")?.ok_or_else(|| given.missing("factor", "a number above 0"))?;
    if factor <= 0.0 {
        return Err(ConfigError::RopeFactor { field: given.path("factor"), found: factor });
    }
    let original = given.required_integer("original_max_position_embeddings", 1..=i32::MAX as u64)?;
    Ok(Some(RopeScaling {
        factor,
        original_max_position: original as usize,
        beta_fast: positive(given, "beta_fast")?.unwrap_or(32.0),
        beta_slow: positive(given, "beta_slow")?.unwrap_or(1.0),
        mscale: not_negative(given, "mscale")?,
        mscale_all_dim: not_negative(given, "mscale_all_dim")?,
    }))
}

/// `type` or `rope_type`; where both are given they must agree.
fn kind<'a>(given: &Fields<'a>) -> Result<&'a str, ConfigError> {
    let both = [given.text("rope_type")?, given.text("type")?];
    let [newer, older] = both;
    let kind = newer.or(older).ok_or_else(|| given.missing("rope_type", "\"yarn\" or \"default\""))?;
    for (key, value) in ["rope_type", "type"].into_iter().zip(both) {
        if value.is_some_and(|value| value != kind || !["yarn", "default"].contains(&value)) {
            return Err(ConfigError::RopeType {
                field: given.path(key),
                found: json::quote(value.unwrap_or_default()),
            });
        }
    }
    Ok(kind)
}

fn positive(given: &Fields<'_>, key: &str) -> Result<Option<f64>, ConfigError> {
    match given.number(key)? {
        Some(number) if number <= 0.0 => Err(given.out_of_range(key, number, "a number above 0").into()),
        number => Ok(number),
    }
}

fn not_negative(given: &Fields<'_>, key: &str) -> Result<Option<f64>, ConfigError> {
    match given.number(key)? {
        Some(number) if number < 0.0 => Err(given.out_of_range(key, number, "a number of at least 0").into()),
        number => Ok(number),
    }
}
