//! The addresses of this machine.

use std::ffi::CStr;
use std::io;
use std::net::IpAddr;
use std::net::{Ipv4Addr, Ipv6Addr};

/// Name and address of every network interface that is up; loopback and addresses that mean
/// something only together with an interface are left out.
///
/// # Errors
/// The system's own.
#[expect(unsafe_code, reason = "std cannot list this machine's addresses")]
pub fn list() -> io::Result<Vec<(String, IpAddr)>> {
    let mut head: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: `head` receives a list that we free below.
    if unsafe { libc::getifaddrs(&mut head) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut found = Vec::new();
    let mut next = head;
    // SAFETY: the list stays as it is until it is freed; every entry is valid or the end, null.
    while let Some(entry) = unsafe { next.as_ref() } {
        next = entry.ifa_next;
        let up = entry.ifa_flags & libc::IFF_UP as u32 != 0;
        if !up || entry.ifa_addr.is_null() {
            continue;
        }
        // SAFETY: an address is as long as its family says, and the name ends with a zero.
        let (name, address) = unsafe {
            let name = CStr::from_ptr(entry.ifa_name)
                .to_string_lossy()
                .into_owned();
            let address = match i32::from((*entry.ifa_addr).sa_family) {
                libc::AF_INET => {
                    let v4 = &*entry.ifa_addr.cast::<libc::sockaddr_in>();
                    IpAddr::from(Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr)))
                }
                libc::AF_INET6 => {
                    let v6 = &*entry.ifa_addr.cast::<libc::sockaddr_in6>();
                    IpAddr::from(Ipv6Addr::from(v6.sin6_addr.s6_addr))
                }
                _ => continue,
            };
            (name, address)
        };
        let link_local = match address {
            IpAddr::V4(a) => a.is_link_local(),
            IpAddr::V6(a) => a.is_unicast_link_local(),
        };
        if !address.is_loopback() && !link_local {
            found.push((name, address));
        }
    }
    // SAFETY: `head` came from getifaddrs, and nothing refers to the list any more.
    unsafe { libc::freeifaddrs(head) };
    // Older programs of a cluster know IPv4 alone.
    found.sort_by_key(|(_, address)| address.is_ipv6());
    Ok(found)
}
