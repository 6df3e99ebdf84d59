//! JPEG through libjpeg-turbo and PNG.

use std::io::Read;
use std::path::Path;

use super::{DecodeError, Frame};

/// Larger pictures come from damaged headers rather than cameras.
const MAX_PIXELS: usize = 1 << 28;

#[derive(Default)]
pub(super) struct ImageDecoder {
    file: Vec<u8>,
    jpeg: Option<turbojpeg::Decompressor>,
}

impl ImageDecoder {
    pub(super) fn decode(&mut self, path: &Path, out: &mut Frame) -> Result<(), DecodeError> {
        self.file.clear();
        fs_err::File::open(path)
            .and_then(|mut file| file.read_to_end(&mut self.file))
            .map_err(|e| DecodeError::from_io(path, &e))?;
        match self.file.as_slice() {
            [0xff, 0xd8, 0xff, ..] => self.jpeg(path, out),
            [0x89, b'P', b'N', b'G', ..] => png(path, &self.file, out),
            [] => Err(DecodeError::broken(path, "the file is empty")),
            _ => Err(DecodeError::unsupported(
                path,
                format!(
                    "it begins with {:02x?}, neither JPEG nor PNG",
                    &self.file[..self.file.len().min(8)]
                ),
            )),
        }
    }

    fn jpeg(&mut self, path: &Path, out: &mut Frame) -> Result<(), DecodeError> {
        let broken = |e: turbojpeg::Error| DecodeError::broken(path, format!("JPEG: {e}"));
        let decoder = match &mut self.jpeg {
            Some(decoder) => decoder,
            empty => empty.insert(turbojpeg::Decompressor::new().map_err(broken)?),
        };
        let header = decoder.read_header(&self.file).map_err(broken)?;
        if matches!(
            header.colorspace,
            turbojpeg::Colorspace::CMYK | turbojpeg::Colorspace::YCCK
        ) {
            return Err(DecodeError::unsupported(
                path,
                "CMYK JPEG; convert it to RGB first",
            ));
        }
        check_size(path, header.width, header.height)?;
        out.reshape(header.width as u32, header.height as u32);
        let image = turbojpeg::Image {
            pixels: out.rgb.as_mut_slice(),
            width: header.width,
            pitch: header.width * 3,
            height: header.height,
            format: turbojpeg::PixelFormat::RGB,
        };
        // TurboJPEG reports libjpeg's warnings, such as a file that ends early, as failures.
        decoder.decompress(&self.file, image).map_err(broken)
    }
}

fn png(path: &Path, file: &[u8], out: &mut Frame) -> Result<(), DecodeError> {
    let broken = |e: png::DecodingError| DecodeError::broken(path, format!("PNG: {e}"));
    let mut decoder = png::Decoder::new(std::io::Cursor::new(file));
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().map_err(broken)?;
    let (width, height) = reader.info().size();
    check_size(path, width as usize, height as usize)?;
    let (color, _) = reader.output_color_type();
    let channels = color.samples();
    out.reshape(width, height);
    if channels == 3 {
        reader.next_frame(&mut out.rgb).map_err(broken)?;
    } else {
        let mut samples = vec![0; width as usize * height as usize * channels];
        reader.next_frame(&mut samples).map_err(broken)?;
        for (rgb, pixel) in out
            .rgb
            .chunks_exact_mut(3)
            .zip(samples.chunks_exact(channels))
        {
            match pixel {
                [grey] | [grey, _] => rgb.fill(*grey),
                _ => rgb.copy_from_slice(&pixel[..3]),
            }
        }
    }
    // The picture is whole before the file is: a cut after the last row shows only here.
    reader.finish().map_err(broken)
}

fn check_size(path: &Path, width: usize, height: usize) -> Result<(), DecodeError> {
    if width == 0 || height == 0 || width.saturating_mul(height) > MAX_PIXELS {
        return Err(DecodeError::unsupported(
            path,
            format!("{width} x {height} pixels; at most 2^28 in all"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::Decoder;

    fn pixels(width: usize, height: usize) -> Vec<u8> {
        (0..width * height)
            .flat_map(|i| [(i % width * 7) as u8, (i / width * 5) as u8, 90])
            .collect()
    }

    fn jpeg_bytes(format: turbojpeg::PixelFormat, subsamp: turbojpeg::Subsamp) -> Vec<u8> {
        let (width, height, size) = (33, 21, format.size());
        let pixels: Vec<u8> = pixels(width, height)
            .chunks(3)
            .flat_map(|p| [p[0], p[1], p[2], 0][..size].to_vec())
            .collect();
        let image = turbojpeg::Image {
            pixels: pixels.as_slice(),
            width,
            pitch: width * size,
            height,
            format,
        };
        turbojpeg::compress(image, 95, subsamp).unwrap().to_vec()
    }

    fn decode(bytes: &[u8]) -> Result<Frame, DecodeError> {
        let dir = tempfile::tempdir().unwrap();
        // The name lies on purpose: the content decides.
        let path = dir.path().join("picture.bmp");
        fs_err::write(&path, bytes).unwrap();
        let mut frame = Frame {
            width: 1,
            height: 1,
            rgb: vec![7; 50_000],
        };
        Decoder::new().image(&path, &mut frame).map(|()| frame)
    }

    fn png_bytes(color: png::ColorType, depth: png::BitDepth, data: &[u8]) -> Vec<u8> {
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, 4, 2);
        encoder.set_color(color);
        encoder.set_depth(depth);
        if color == png::ColorType::Indexed {
            encoder.set_palette(vec![0, 0, 0, 10, 20, 30]);
        }
        encoder
            .write_header()
            .unwrap()
            .write_image_data(data)
            .unwrap();
        file
    }

    #[test]
    fn jpeg_comes_back_close_to_what_was_written() {
        let frame = decode(&jpeg_bytes(
            turbojpeg::PixelFormat::RGB,
            turbojpeg::Subsamp::None,
        ))
        .unwrap();
        assert_eq!(
            (frame.width, frame.height, frame.rgb.len()),
            (33, 21, 33 * 21 * 3)
        );
        let worst = frame
            .rgb
            .iter()
            .zip(pixels(33, 21))
            .map(|(a, b)| a.abs_diff(b))
            .max();
        assert!(worst < Some(12), "{worst:?}");
    }

    #[test]
    fn grey_jpeg_has_three_equal_channels() {
        let frame = decode(&jpeg_bytes(
            turbojpeg::PixelFormat::GRAY,
            turbojpeg::Subsamp::Gray,
        ))
        .unwrap();
        assert!(frame.rgb.chunks(3).all(|p| p[0] == p[1] && p[1] == p[2]));
        assert_eq!(frame.rgb.len(), 33 * 21 * 3);
    }

    #[test]
    fn cmyk_jpeg_is_refused_by_name() {
        let error = decode(&jpeg_bytes(
            turbojpeg::PixelFormat::CMYK,
            turbojpeg::Subsamp::None,
        ))
        .unwrap_err();
        assert!(matches!(&error, DecodeError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains("CMYK"), "{error}");
    }

    #[test]
    fn a_cut_jpeg_is_an_error_wherever_it_is_cut() {
        let whole = jpeg_bytes(turbojpeg::PixelFormat::RGB, turbojpeg::Subsamp::None);
        for length in [4, 100, whole.len() / 2, whole.len() - 40, whole.len() - 2] {
            let error = decode(&whole[..length]).unwrap_err();
            assert!(
                matches!(&error, DecodeError::Broken { .. }),
                "{length}: {error}"
            );
        }
    }

    #[test]
    fn png_of_every_colour_type_becomes_rgb() {
        use png::{BitDepth::*, ColorType::*};
        let grey: Vec<u8> = (0..8).map(|i| i * 30).collect();
        let rgb: Vec<u8> = grey.iter().flat_map(|g| [*g, g / 2, 3]).collect();
        let spread = |f: fn(&[u8]) -> Vec<u8>| rgb.chunks(3).flat_map(f).collect::<Vec<u8>>();
        let wide: Vec<u8> = rgb.iter().flat_map(|v| [*v, 200]).collect();
        let tripled: Vec<u8> = grey.iter().flat_map(|g| [*g; 3]).collect();
        let with_alpha: Vec<u8> = grey.iter().flat_map(|g| [*g, 9]).collect();
        assert_eq!(decode(&png_bytes(Rgb, Eight, &rgb)).unwrap().rgb, rgb);
        assert_eq!(
            decode(&png_bytes(
                Rgba,
                Eight,
                &spread(|p| vec![p[0], p[1], p[2], 5])
            ))
            .unwrap()
            .rgb,
            rgb
        );
        assert_eq!(decode(&png_bytes(Rgb, Sixteen, &wide)).unwrap().rgb, rgb);
        assert_eq!(
            decode(&png_bytes(Grayscale, Eight, &grey)).unwrap().rgb,
            tripled
        );
        assert_eq!(
            decode(&png_bytes(GrayscaleAlpha, Eight, &with_alpha))
                .unwrap()
                .rgb,
            tripled
        );
        let indexed = decode(&png_bytes(Indexed, One, &[0b0101_0000, 0b1010_0000])).unwrap();
        assert_eq!(indexed.rgb[..6], [0, 0, 0, 10, 20, 30]);
        let one_bit = decode(&png_bytes(Grayscale, One, &[0b0101_0000, 0b1010_0000])).unwrap();
        assert_eq!(one_bit.rgb[..6], [0, 0, 0, 255, 255, 255]);
    }

    #[test]
    fn a_cut_png_is_an_error() {
        let whole = png_bytes(png::ColorType::Rgb, png::BitDepth::Eight, &[77; 24]);
        for length in [8, 30, whole.len() - 20, whole.len() - 4] {
            assert!(
                matches!(decode(&whole[..length]), Err(DecodeError::Broken { .. })),
                "{length}"
            );
        }
    }

    #[test]
    fn what_is_no_picture_says_so() {
        assert!(matches!(decode(b""), Err(DecodeError::Broken { .. })));
        assert!(
            decode(b"hello world")
                .unwrap_err()
                .to_string()
                .contains("neither JPEG nor PNG")
        );
        let missing = Decoder::new()
            .image(Path::new("no/such.jpg"), &mut Frame::default())
            .unwrap_err();
        assert!(matches!(&missing, DecodeError::Missing { .. }), "{missing}");
        assert!(missing.to_string().contains("no/such.jpg"));
    }
}
