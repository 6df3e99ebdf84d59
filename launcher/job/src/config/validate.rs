//! Rules between values that the types cannot express.
